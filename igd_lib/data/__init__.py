"""Real images: where they lie, in which order, how they are read and augmented."""
