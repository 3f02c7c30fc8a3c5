"""Probe samples, and the pass that runs them through a frozen model."""
