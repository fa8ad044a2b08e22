"""The Triton backend: each verb one launch over all levels of a pyramid."""
