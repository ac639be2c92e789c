"From files to tables of images and tensors. Importing the room registers the embedded stream and the HDMaps as datasets."

from adflow.data import hdmap_files as _hdmap_files, hdmap_sim as _hdmap_sim, synthetic as _synthetic  # noqa: F401
