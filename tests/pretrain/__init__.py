import vmf_pretrain  # noqa: F401 -- mends torchvision's import before a test imports lightning, timm or torchvision
