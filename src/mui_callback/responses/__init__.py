"""What the samples of a study are: questions of a task from a hub or a file, and the responses that are scored."""
