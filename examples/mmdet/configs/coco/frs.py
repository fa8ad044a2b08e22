# What every config of this folder adds to mmdet's own: the integration, and pictures of the masks at each validation.
custom_imports = dict(imports=["frs_kernels.integrations.mmdet"], allow_failed_imports=False)
custom_hooks = [dict(type="FRSMaskHook", num_images=4), dict(type="FRSExportHook")]
