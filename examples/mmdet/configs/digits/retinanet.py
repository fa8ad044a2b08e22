_base_ = ["./_base_/trunk.py", "./_base_/digits.py"]

model = dict(
    type="RetinaNet",
    bbox_head=dict(
        type="RetinaHead",
        num_classes=10,
        in_channels=32,
        feat_channels=32,
        stacked_convs=2,
        norm_cfg=dict(type="GN", num_groups=4),
        anchor_generator=dict(
            type="AnchorGenerator",
            octave_base_scale=2,  # half of the usual: digits are 12 to 88 px wide
            scales_per_octave=3,
            ratios=[0.7, 1.0, 1.4],
            strides=[8, 16, 32, 64, 128],
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[1.0] * 4),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=1.0),
    ),
    train_cfg=dict(
        assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type="PseudoSampler"),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100
    ),
)
