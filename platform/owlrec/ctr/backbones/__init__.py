"""The CTR backbones, one file each, and a line here."""

from typing import TYPE_CHECKING

from owlrec.registry import Registry

if TYPE_CHECKING:
    from owlrec.ctr.backbones.interface import Backbone

BACKBONES: "Registry[Backbone]" = Registry(
    "backbone",
    {
        "din": "owlrec.ctr.backbones.din.DIN",
        "dien": "owlrec.ctr.backbones.dien.DIEN",
        "dcnv1": "owlrec.ctr.backbones.dcnv1.DCNv1",
        "dcnv2": "owlrec.ctr.backbones.dcnv2.DCNv2",
        "deepfm": "owlrec.ctr.backbones.deepfm.DeepFM",
        "xdeepfm": "owlrec.ctr.backbones.xdeepfm.XDeepFM",
        "autoint": "owlrec.ctr.backbones.autoint.AutoInt",
        "fibinet": "owlrec.ctr.backbones.fibinet.FiBiNET",
        "fignn": "owlrec.ctr.backbones.fignn.FiGNN",
    },
)
