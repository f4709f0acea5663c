"""The CTR backbones: one file per group and one line here per backbone."""

from typing import TYPE_CHECKING

from owlrec.config import Registry

if TYPE_CHECKING:
    from owlrec.ctr.backbones.networks import Backbone

BACKBONES: "Registry[Backbone]" = Registry(
    "backbone",
    {
        "din": "owlrec.ctr.backbones.networks.DIN",
        "dien": "owlrec.ctr.backbones.networks.DIEN",
        "dcnv1": "owlrec.ctr.backbones.networks.DCNv1",
        "dcnv2": "owlrec.ctr.backbones.networks.DCNv2",
        "deepfm": "owlrec.ctr.backbones.networks.DeepFM",
        "xdeepfm": "owlrec.ctr.backbones.networks.XDeepFM",
        "autoint": "owlrec.ctr.backbones.networks.AutoInt",
        "fibinet": "owlrec.ctr.backbones.networks.FiBiNET",
        "fignn": "owlrec.ctr.backbones.networks.FiGNN",
    },
)
