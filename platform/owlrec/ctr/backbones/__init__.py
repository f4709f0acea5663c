"""The CTR backbones: one file per group and one line here per backbone."""

from typing import TYPE_CHECKING

from owlrec.config import Registry

if TYPE_CHECKING:
    from owlrec.ctr.backbones.interface import Backbone

BACKBONES: "Registry[Backbone]" = Registry(
    "backbone",
    {
        "din": "owlrec.ctr.backbones.sequences.DIN",
        "dien": "owlrec.ctr.backbones.sequences.DIEN",
        "dcnv1": "owlrec.ctr.backbones.crosses.DCNv1",
        "dcnv2": "owlrec.ctr.backbones.crosses.DCNv2",
        "deepfm": "owlrec.ctr.backbones.crosses.DeepFM",
        "xdeepfm": "owlrec.ctr.backbones.crosses.XDeepFM",
        "autoint": "owlrec.ctr.backbones.attention.AutoInt",
        "fibinet": "owlrec.ctr.backbones.attention.FiBiNET",
        "fignn": "owlrec.ctr.backbones.attention.FiGNN",
    },
)
