import vmf_pretrain.with_torchvision  # noqa: F401 -- mends torchvision's import before a test imports lightning, timm or torchvision
