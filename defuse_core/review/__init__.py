"""Between distill and correct: the images that people label, and the verdict on each component."""
