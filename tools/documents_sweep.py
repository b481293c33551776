#!/usr/bin/env python3
"""Compares the documents that `relora-kit tokenize` finds with those that `datasets`, pyarrow, pandas and json read.

    tools/documents_sweep.py [PATH-OF-relora-kit]

Needs datasets, pyarrow and pandas. Writes files of every kind into a temporary folder, tokenizes each by bytes, cuts the shard
at the ends of documents, and prints one line per case; exits 1 if a case differs. A case expects documents, or words of a refusal.
"""
import bz2, gzip, io, json, os, struct, subprocess, sys, tempfile, zipfile
import datasets, pandas, pyarrow as pa, pyarrow.feather, pyarrow.ipc, pyarrow.parquet as pq

datasets.disable_progress_bars()
PROGRAM = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else "relora-kit"
TEXTS = ["Hello world.", "Zweites: \u00e4\u00f6\u00fc \U0001f600", "third\nwith \"lines\"\tand \\ tabs", "\u2028 separators \x7f"]
ROWS = [{"text": t, "url": f"http://x/{i}", "n": i} for i, t in enumerate(TEXTS)]
SET = datasets.Dataset.from_list(ROWS)
failed = 0


def tokenize(path, *flags):
    shard = "shard.safetensors"
    done = subprocess.run([PROGRAM, "--progress", "never", "tokenize", path, "-o", shard, "--force", "--format", "json", *flags],
                          capture_output=True, text=True)
    if done.returncode:
        return None, done.stderr, done.returncode
    data = open(shard, "rb").read()
    header, = struct.unpack("<Q", data[:8])
    ids = struct.unpack(f"<{(len(data) - 8 - header) // 2}H", data[8 + header:])
    documents, now = [], bytearray()
    for i in ids:
        if i == 256:
            documents.append(now.decode())
            now = bytearray()
        else:
            now.append(i)
    return documents, done.stdout, 0


def case(name, path, expected, *flags):
    global failed
    found, said, code = tokenize(path, *flags)
    if isinstance(expected, str):
        good = found is None and code == 2 and expected in said and "panicked" not in said and "help:" in said
    else:
        good = found == expected
    failed += not good
    print(f"{'ok   ' if good else 'WRONG'} {name}")
    if not good:
        print(f"      expected {expected!r}\n      found    {found!r} {said[:400]}")


def write(path, data):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return path


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


def loaded(path):
    """What datasets reads from a JSON file."""
    cache = tempfile.mkdtemp(dir=".")
    return datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)["text"][:]


os.chdir(tempfile.mkdtemp())
lines = "".join(json.dumps(r) + "\n" for r in ROWS)
SET.to_json("to_json.json")
SET.to_json("ascii.jsonl", force_ascii=True)
SET.to_json("list.json", lines=False, orient="records")
pandas.DataFrame(ROWS).to_json("pandas.json", orient="records", lines=True, force_ascii=False)
for name, data in {
    "lines.json": lines, "lines.jsonl": lines, "lines.ndjson": lines, "crlf.jsonl": lines.replace("\n", "\r\n"),
    "blank.jsonl": lines.replace("\n", "\n\n"), "no_end.jsonl": lines.rstrip("\n"), "array.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=2), "unicode.json": json.dumps(ROWS, ensure_ascii=False),
    "c4.json.gz": gzip.compress(lines.encode()), "two_members.json.gz": gzip.compress(lines.encode()[:50]) + gzip.compress(lines.encode()[50:]),
    "unnamed_gzip.jsonl": gzip.compress(lines.encode()), "bom.jsonl": b"\xef\xbb\xbf" + lines.encode(), "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "lines.jsonl.zst": zstd(lines.encode()),
}.items():
    write(name, data)
    case(name, name, TEXTS)
for name in ["to_json.json", "ascii.jsonl", "list.json", "pandas.json"]:
    case(name, name, TEXTS)
for name in ["lines.json", "array.json", "indented.json", "to_json.json", "c4.json.gz"]:
    case(f"{name} as datasets reads it", name, list(loaded(name)))
case("concatenated objects", write("spread.json", "".join(json.dumps(r, indent=1) + "\n" for r in ROWS)), TEXTS)
case("one object", write("one.json", json.dumps(ROWS[0], indent=1)), TEXTS[:1])
case("one line without an end", write("single.json", json.dumps(ROWS[0])), TEXTS[:1])
case("column-wise JSON", write("columns.json", json.dumps({"text": TEXTS})), "it is a list")
case("pandas' default orient", write("frame.json", pandas.DataFrame(ROWS).to_json()), "it is an object")
case("nested below data", write("nested.json", json.dumps({"version": 1, "data": ROWS})), "the record has version, data")
case("a field that does not exist", "lines.json", "no text in the field 'nothing'", "--field", "nothing")
case("another field", "lines.json", [r["url"] for r in ROWS], "--field", "url")
case("as text", "lines.json", [lines], "--as", "text")
odd = '{"text":"a","x":NaN}\n{"text":"b","x":[Infinity,-Infinity]}\n{"text":"c","x":"\\ud83d"}\n'
case("what Python's json reads", write("python.jsonl", odd), [json.loads(line)["text"] for line in odd.splitlines()])
for what, bad in {"a list": "[1]", "a string": '"x"', "a number": "5", "true or false": "true", "null": "null", "half of a UTF-16 pair": '{"text":"\\ud83d"}',
                  "stands twice": '{"text":"a","text":"b"}', "not UTF-8": b'{"text":"caf\xe9"}', "this is not JSON": '{"text":"a"', "it is null": '{"text":null}',
                  "control character": '{"text":"a\tb"}', "the record is empty": "{}"}.items():
    data = b'{"text":"first"}\n' + (bad if isinstance(bad, bytes) else bad.encode()) + b'\n{"text":"last"}\n'
    name = write("bad.jsonl", data)
    case(f"a line with {what}", name, what)
    case(f"a line with {what}, skipped", name, ["first", "last"], "--skip-unreadable")

table = pa.Table.from_pylist(ROWS)
for codec in ["none", "snappy", "gzip", "brotli", "lz4", "zstd"]:
    pq.write_table(table, f"{codec}.parquet", compression=codec, row_group_size=2)
    case(f"Parquet, {codec}", f"{codec}.parquet", pq.read_table(f"{codec}.parquet")["text"].to_pylist())
pq.write_table(table, "v2.parquet", data_page_version="2.0", use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY", "url": "PLAIN", "n": "PLAIN"})
case("Parquet, pages of version 2, delta encoding", "v2.parquet", TEXTS)
for kind in [pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]:
    column = pa.array(TEXTS).cast(kind) if not pa.types.is_dictionary(kind) else pa.array(TEXTS).dictionary_encode()
    typed = pa.table({"id": [0] * len(TEXTS), "text": column})
    name = str(kind).split("<")[0]
    pq.write_table(typed, f"{name}.parquet")
    case(f"Parquet, {name}", f"{name}.parquet", TEXTS)
    with pa.ipc.new_stream(f"{name}.arrow", typed.schema) as out:
        out.write_table(typed, max_chunksize=3)
    case(f"Arrow stream, {name}", f"{name}.arrow", TEXTS)
    with pa.ipc.new_file(f"file_{name}.arrow", typed.schema) as out:
        out.write_table(typed, max_chunksize=3)
    case(f"Arrow file, {name}", f"file_{name}.arrow", TEXTS)
nulls = pa.table({"text": ["a", None, "", "b"]})
pq.write_table(nulls, "nulls.parquet")
case("nulls and empty texts", "nulls.parquet", ["a", "b"])
case("a column of numbers", "none.parquet", "expected text", "--field", "n")
case("a column that does not exist", "none.parquet", "has no column 'x': it has text, url, n", "--field", "x")
case("Parquet without its name", os.rename("none.parquet", "blob") or "blob", TEXTS)
for codec in ["lz4", "zstd", "uncompressed"]:
    pa.feather.write_feather(table, f"{codec}.feather", compression=codec)
    case(f"Feather, {codec}", f"{codec}.feather", TEXTS)
write("cut.arrow", open("file_large_string.arrow", "rb").read()[:-30])
case("an Arrow file that is cut short", "cut.arrow", "Arrow")
write("cut.parquet", open("snappy.parquet", "rb").read()[:-30])
case("a Parquet file that is cut short", "cut.parquet", "cut.parquet")

SET.save_to_disk("saved", num_shards=3)
case("save_to_disk", "saved", datasets.load_from_disk("saved")["text"][:])
case("a part of it", "saved/data-00000-of-00003.arrow", TEXTS[:2])
datasets.DatasetDict(train=SET, test=SET).save_to_disk("splits")
case("save_to_disk of two splits", "splits", "holds the splits train, test")
case("one split", "splits/test", TEXTS)
datasets.DatasetDict(train=SET).save_to_disk("one_split")
case("save_to_disk of one split", "one_split", TEXTS)
datasets.load_dataset("json", data_files="lines.jsonl", cache_dir="cache")
cached = next(root for root, _, files in os.walk("cache") if "dataset_info.json" in files)
case("the cache of load_dataset", cached, TEXTS)
SET.select([2, 0]).save_to_disk("chosen")
case("chosen rows", "chosen", datasets.load_from_disk("chosen")["text"][:])

write("hub/blobs/0", lines)
write("hub/snapshots/1/README.md", "card")
os.symlink("../../blobs/0", "hub/snapshots/1/train.jsonl")
write("hub/snapshots/1/.gitattributes", "*.parquet filter=lfs")
case("a snapshot of the hub's cache", "hub/snapshots/1", TEXTS)
write("local/data/train.jsonl", lines)
write("local/.cache/huggingface/download/train.jsonl.metadata", "hash")
case("hf download --local-dir", "local", TEXTS)
os.makedirs("broken"); os.symlink("nowhere", "broken/a.jsonl")
case("a link to nothing", "broken", "link to a file that is not there")
write("repo/package.json", "{}"); write("repo/main.py", "print()")
case("records beside text", "repo", "not clear which are the text")
case("records beside text, as text", "repo", ["print()", "{}"], "--as", "text")
case("only some files", "repo", ["print()"], "--include", "**/*.py")
write("mixed/a.txt", "good"); write("mixed/b.png", b"\x89PNG\xff")
case("a picture beside text", "mixed", ["good"])
for name, data, words in [("a.csv", "text\nx\n", "holds a table (csv)"), ("a.tsv", "text\nx\n", "holds a table (tsv)"), ("a.txt.bz2", bz2.compress(b"x"), "bzip2"),
                          ("utf16.txt", "text".encode("utf-16"), "UTF-16"), ("latin1.txt", "caf\u00e9".encode("latin-1"), "line 1: the byte 0xe9"),
                          ("empty.txt", "", "1 documents are empty"), ("plain.json", "no JSON", "this is not JSON"), ("a.txt.gz", "plain", "neither gzip's nor zstd's")]:
    case(name, write(name, data), words)
with zipfile.ZipFile("a.zip", "w") as archive:
    archive.writestr("a.txt", "x")
case("a.zip", "a.zip", "a zip archive")
case("a byte order mark in text", write("bom.txt", b"\xef\xbb\xbftext"), ["text"])
case("a device", "/dev/zero", "neither a file nor a pipe")
print(f"{failed} wrong")
sys.exit(failed > 0)
