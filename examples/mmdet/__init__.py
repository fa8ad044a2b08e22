"""mmdetection's detectors distilled with frs_kernels: configs for COCO, and small ones that train on a CPU."""
