"""When a training run is probed, what is remembered of it, and what happens when a probe fails."""
