"""The Triton backend: score, imitate and scale_, each one launch over all levels of a pyramid."""
