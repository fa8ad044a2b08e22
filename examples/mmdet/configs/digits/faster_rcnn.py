_base_ = ["mmdet::_base_/models/faster-rcnn_r50_fpn.py", "./_base_/digits.py"]

model = dict(
    backbone=dict(
        depth=18,
        base_channels=8,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(scales=[4]),  # half of the usual: digits are 12 to 88 px wide
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32, finest_scale=28),
        bbox_head=dict(in_channels=32, fc_out_channels=128, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)),
)
