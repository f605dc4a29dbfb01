"""The tests, a folder a stage as the code has them; beside the folders lies what they share."""
