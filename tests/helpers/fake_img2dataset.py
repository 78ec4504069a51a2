"""Stand-in for img2dataset in tests: images are drawn from the address, none is downloaded.

Addresses with "gone" fail. The options are those of img2dataset 1.47.0, others are refused.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
from tiny_data import encoded, make_image

_NAMES = """
    url_list image_size output_folder processes_count resize_mode resize_only_if_bigger
    upscale_interpolation downscale_interpolation encode_quality encode_format skip_reencode
    output_format input_format url_col caption_col bbox_col thread_count number_sample_per_shard
    extract_exif save_additional_columns timeout enable_wandb wandb_project oom_shard_count
    compute_hash verify_hash distributor subjob_size retries disable_all_reencoding min_image_size
    max_image_area max_aspect_ratio incremental_mode max_shard_retry user_agent_token
    disallowed_header_directives
"""
OPTIONS = _NAMES.split()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in OPTIONS:
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    assert options.output_format == "webdataset" and options.input_format == "parquet"
    folder = Path(options.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    size, shard = int(options.number_sample_per_shard), 0
    for path in sorted(Path(options.url_list).glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        for start in range(0, len(rows), size):
            if not (folder / f"{shard:05d}_stats.json").exists():
                _write(folder, shard, rows[start : start + size], options)
            shard += 1


def _write(folder: Path, shard: int, rows: list[dict], options) -> None:
    good = 0
    with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
        for number, row in enumerate(rows):
            if "gone" in row[options.url_col]:
                continue
            good += 1
            key = f"{shard:05d}{number:04d}"
            more = json.loads(options.save_additional_columns or "[]")
            caption = row[options.caption_col]
            meta = {name: row[name] for name in more}
            meta |= {"caption": caption, "url": row[options.url_col]}
            meta |= {"key": key, "status": "success", "error_message": None}
            seed = sum(row[options.url_col].encode())
            parts = {
                "jpg": encoded(make_image(seed)),
                "txt": caption.encode(),
                "json": json.dumps(meta).encode(),
            }
            for extension, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    failed = len(rows) - good
    stats = {"count": len(rows), "successes": good, "failed_to_download": failed}
    stats |= {"status_dict": {"success": good, "HTTP Error 404: Not Found": failed}}
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))


if __name__ == "__main__":
    main()
