_base_ = "./retinanet.py"

model = dict(
    _delete_=True,
    type="FRSDistiller",
    student=_base_.model,
    teacher="{{ fileDirname }}/retinanet_teacher.py",
    teacher_checkpoint="runs/mmdet/retinanet_teacher/last.pth",
    preset="retinanet",
    warmup=100,
)
custom_hooks = [dict(type="FRSMaskHook", num_images=4), dict(type="FRSExportHook")]
