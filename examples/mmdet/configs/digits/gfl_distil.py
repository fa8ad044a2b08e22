_base_ = "./gfl.py"

model = dict(
    _delete_=True,
    type="FRSDistiller",
    student=_base_.model,
    teacher="{{ fileDirname }}/gfl_teacher.py",
    teacher_checkpoint="runs/mmdet/gfl_teacher/iter_500.pth",
    preset="gfl",
    loss=dict(feat_weight=0.002),  # these networks' features are larger than those of pretrained ones
    warmup=100,
)
custom_hooks = [dict(type="FRSMaskHook", num_images=4), dict(type="FRSExportHook")]
