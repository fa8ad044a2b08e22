"""Distils a torchvision detector and an Ultralytics model on the digits: `python -m examples.frameworks`."""
