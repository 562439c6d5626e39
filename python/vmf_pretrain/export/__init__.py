"""Networks of runs in the forms of other libraries."""

from vmf_pretrain import with_torchvision  # noqa: F401 -- before torchvision, timm or transformers is imported
