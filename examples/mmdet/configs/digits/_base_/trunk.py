# What the four small students share: a ResNet-18 of an eighth of the width, trained from nothing, and a pyramid P3 to P7.
model = dict(
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type="ResNet",
        depth=18,
        base_channels=8,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        style="pytorch",
    ),
    neck=dict(
        type="FPN",
        in_channels=[8, 16, 32, 64],
        out_channels=32,
        start_level=1,
        add_extra_convs="on_output",
        num_outs=5,
    ),
)
