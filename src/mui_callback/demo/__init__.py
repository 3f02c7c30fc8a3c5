"""A small MoE with shared experts, trained from scratch on a laptop's CPU with `MUICallback` watching."""
