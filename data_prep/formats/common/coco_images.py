"""Images of COCO by their number, which is the same in the releases of 2014 and 2017."""

from data_prep.formats.common.inputs import SkipError, shown

COCO_FOLDERS = ("train2014", "train2017", "val2014", "val2017")


def coco_names(image_id: str) -> tuple[str, ...]:
    """Names that the file of an image has in the releases; raises SkipError for what is no number.

    All images of train2014 are in train2017 too, so one of the two is enough.
    """
    if not (image_id.isascii() and image_id.isdecimal() and len(image_id) <= 12):
        raise SkipError("image_id is not a number of COCO", shown(image_id))
    number = f"{int(image_id):012d}"
    return f"COCO_train2014_{number}.jpg", f"{number}.jpg", f"COCO_val2014_{number}.jpg"
