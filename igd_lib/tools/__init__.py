"""What everything else stands on: files, keys, the machine. Knows nothing of images."""
