"""What one model says about data, and about its own key neurons, asked from the command line."""
