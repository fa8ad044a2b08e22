_base_ = ["mmdet::gfl/gfl_r50_fpn_ms-2x_coco.py", "./frs.py"]

model = dict(
    _delete_=True,
    type="FRSDistiller",
    student=_base_.model,
    teacher="mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py",
    teacher_checkpoint="https://download.openmmlab.com/mmdetection/v2.0/gfl/gfl_r101_fpn_mstrain_2x_coco/gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth",
    preset="gfl",
)
