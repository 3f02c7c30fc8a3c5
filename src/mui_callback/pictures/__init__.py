"""Pictures of a run: what a probe found and how it came there, drawn beside the training, and where they are hung."""
