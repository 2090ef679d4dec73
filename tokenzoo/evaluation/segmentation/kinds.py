"""The segmentation data sets that are known: where they keep their files, and how their labels are numbered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .classes import ADE20K, CITYSCAPES, CITYSCAPES_COLOURS, COCO_STUFF, PASCAL_CONTEXT, VOC
from .files import Files
from .readers import Pair, cityscapes, listed, parallel, plain_folder


@dataclass(frozen=True)
class Kind:
    """What is known about one data set.

    Attributes:
        layout: in words, for messages.
        pairs: lists images and masks of a split, given the files, the folder they lie in, and the split's folder.
        needs: folders that must be there; {} stands for the folder of the split.
        splits: folder of each split by the names it goes by; the first one is the default.
        classes: names in the order of the indices.
        inside: folders below the given root to look into.
        archives: sets of zip archives that together hold the layout.
        zero_label: value 0 is ignored and the others are numbered from 0.
        palette: colours, None for VOC's.
        background: class 0 is the background.
    """

    layout: str
    pairs: Callable[[Files, str, str], list[Pair]]
    needs: tuple[str, ...] = ()
    splits: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    inside: tuple[str, ...] = ("",)
    archives: tuple[tuple[str, ...], ...] = ()
    zero_label: bool = False
    palette: tuple[tuple[int, int, int], ...] | None = None
    background: bool = False


_VOC_TEXT = (
    "VOCdevkit/VOC{0}/{{JPEGImages,{1},ImageSets/{2}}}, masks as single-channel or palette PNG files "
    "and one text file a split"
)
_CONTEXT = {
    "pairs": listed("ImageSets/SegmentationContext", "{}.txt", "JPEGImages", "SegmentationClassContext", ".png"),
    "needs": ("JPEGImages", "SegmentationClassContext"),
    "splits": {"val": "val", "train": "train"},
    "inside": ("", "VOC2010", "VOCdevkit/VOC2010", "pcontext/VOCdevkit/VOC2010"),
}
_CONTEXT_LAYOUT = _VOC_TEXT.format(2010, "SegmentationClassContext", "SegmentationContext")

KINDS: dict[str, Kind] = {
    "folder": Kind(
        "images/*.jpg (or .png, ...) with masks/<same stem>.png, either below the root or below <root>/<split>",
        plain_folder,
    ),
    "ade20k": Kind(
        "ADEChallengeData2016/{images,annotations}/{training,validation} (scene parsing 2016, not the full release of "
        "2021), or ADEChallengeData2016.zip",
        parallel("images/{}", "annotations/{}"),
        ("images/{}", "annotations/{}"),
        {"validation": "validation", "val": "validation", "training": "training", "train": "training"},
        ADE20K,
        ("", "ADEChallengeData2016", "ade20k/ADEChallengeData2016", "ade/ADEChallengeData2016",
         "data/ade/ADEChallengeData2016"),
        (("ADEChallengeData2016.zip",),),
        zero_label=True,
    ),
    "cityscapes": Kind(
        "leftImg8bit/{train,val,test}/<city>/*_leftImg8bit.png and gtFine/<split>/<city>/*_gtFine_labelTrainIds.png "
        "(or labelIds), or leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip",
        cityscapes,
        ("leftImg8bit/{}", "gtFine/{}"),
        {"val": "val", "train": "train", "test": "test"},
        CITYSCAPES,
        ("", "cityscapes", "data/cityscapes"),
        (("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"),),
        palette=CITYSCAPES_COLOURS,
    ),
    "pascal_context59": Kind(_CONTEXT_LAYOUT, classes=PASCAL_CONTEXT, zero_label=True, **_CONTEXT),
    "pascal_context60": Kind(
        _CONTEXT_LAYOUT, classes=("background", *PASCAL_CONTEXT), background=True, **_CONTEXT
    ),
    "voc2012": Kind(
        _VOC_TEXT.format(2012, "SegmentationClass", "Segmentation"),
        listed("ImageSets/Segmentation", "{}.txt", "JPEGImages", "SegmentationClass", ".png"),
        ("JPEGImages", "SegmentationClass"),
        {"val": "val", "train": "train", "trainval": "trainval"},
        VOC,
        ("", "VOC2012", "VOCdevkit/VOC2012"),
        background=True,
    ),
    "coco_stuff164k": Kind(
        "images/{train2017,val2017} and annotations/{train2017,val2017}/*_labelTrainIds.png",
        parallel("images/{}", "annotations/{}", "_labelTrainIds.png"),
        ("images/{}", "annotations/{}"),
        {"val": "val2017", "val2017": "val2017", "train": "train2017", "train2017": "train2017"},
        COCO_STUFF,
        ("", "coco_stuff164k", "data/coco_stuff164k"),
    ),
    "coco_stuff10k": Kind(
        "images/{train2014,test2014}, annotations/{train2014,test2014}/*_labelTrainIds.png and "
        "imagesLists/{train,test}.txt",
        listed("imagesLists", "{}.txt", "images/{}2014", "annotations/{}2014", "_labelTrainIds.png"),
        ("images/{}2014", "annotations/{}2014", "imagesLists"),
        {"test": "test", "train": "train"},
        COCO_STUFF,
        ("", "coco_stuff10k", "data/coco_stuff10k"),
        zero_label=True,
    ),
}  # fmt: skip
