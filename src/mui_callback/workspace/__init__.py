"""A workspace of Weights & Biases for runs with MUI, made by wandb-workspaces."""
