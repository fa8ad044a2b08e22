_base_ = "./faster_rcnn.py"

model = dict(
    _delete_=True,
    type="FRSDistiller",
    student=_base_.model,
    teacher="{{ fileDirname }}/faster_rcnn_teacher.py",
    teacher_checkpoint="runs/mmdet/faster_rcnn_teacher/iter_500.pth",
    preset="faster_rcnn",
    loss=dict(feat_weight=0.002),  # these networks' features are larger than those of pretrained ones
    warmup=100,
)
custom_hooks = [dict(type="FRSMaskHook", num_images=4), dict(type="FRSExportHook")]
