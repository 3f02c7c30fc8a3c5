"""Contributions, selection of key neurons, sets and counts: functions of tensors, no modules."""
