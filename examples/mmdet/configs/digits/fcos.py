_base_ = ["./_base_/trunk.py", "./_base_/digits.py"]

model = dict(
    type="FCOS",
    bbox_head=dict(
        type="FCOSHead",
        num_classes=10,
        in_channels=32,
        feat_channels=32,
        stacked_convs=2,
        norm_cfg=dict(type="GN", num_groups=4, requires_grad=True),
        strides=[8, 16, 32, 64, 128],
        # a quarter of the usual: digits are 12 to 88 px wide
        regress_ranges=((-1, 16), (16, 32), (32, 64), (64, 128), (128, 1e8)),
        norm_on_bbox=True,
        centerness_on_reg=True,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=1.0),
        loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
    ),
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100
    ),
)
