_base_ = ["mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "./frs.py"]

model = dict(
    _delete_=True,
    type="FRSDistiller",
    student=_base_.model,
    teacher="mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py",
    teacher_checkpoint="https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_1x_coco/faster_rcnn_r101_fpn_1x_coco_20200130-f513f705.pth",
    preset="faster_rcnn",
)
