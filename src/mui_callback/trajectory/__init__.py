"""Checkpoint-trajectory studies: one probe over many checkpoints of one model or several, resumable at any moment."""
