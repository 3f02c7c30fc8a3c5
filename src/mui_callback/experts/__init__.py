"""Finding expert layers and reading them: one file for each way that weights are laid out."""
