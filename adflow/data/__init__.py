"From files to tables of images and tensors. Importing the room registers the embedded stream as a dataset."

from adflow.data import synthetic as _synthetic  # noqa: F401
