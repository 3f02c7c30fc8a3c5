"""The x axes on which trainers log their losses to W&B and Trackio."""

from mui_callback.metrics.catalogue import PREFIX

HF_STEP_KEY = "train/global_step"
LIGHTNING_STEP_KEY = "trainer/global_step"
OWN_STEP_KEY = f"{PREFIX}/step"
"""Where no trainer has one."""
