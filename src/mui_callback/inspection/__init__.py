"""What `mui-callback inspect` says about a model before anything is trained."""
