_base_ = ["mmdet::retinanet/retinanet_r50_fpn_2x_coco.py", "./frs.py"]

model = dict(
    _delete_=True,
    type="FRSDistiller",
    student=_base_.model,
    teacher="mmdet::retinanet/retinanet_r101_fpn_2x_coco.py",
    teacher_checkpoint="https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth",
    preset="retinanet",
)
