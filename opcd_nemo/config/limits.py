"""What files may ask of a program before it says no: sizes, counts, depths, each with its reason.

A file from anywhere must not cost more than 3 CPU-seconds and 150 MiB before it is refused. The
largest real files that are known fit with room to spare; whoever has a larger file raises the
number here.
"""

from __future__ import annotations

KIB, MIB = 1 << 10, 1 << 20

# ------------------------------------------------------------------------- files of a model folder

SETTINGS_BYTES = 4 * MIB
"""Of a JSON file of settings or of an index: the largest known, of 16,000 tensors, has 1.3 MiB,
and 4 MiB of `[],` are 90 MiB of lists."""

RECORD_BYTES = 64 * MIB
"""Of a JSON file that a run of this project has written: the samples of an evaluation."""

SAMPLES_BYTES = 1024 * MIB
"""Of a file of samples that a teacher has written: 100 answers of 16,384 tokens take 64 MiB."""

JSON_ITEMS = 2_000_000
"""Of any of these: brackets and commas. A number costs 32 bytes, an empty list or mapping 64."""

TOKENIZER_BYTES = 48 * MIB
"""Of a tokenizer.json: that of a vocabulary of 262,144 has 32 MiB."""

TOKENIZER_ITEMS = 3_000_000
"""Brackets and commas of a tokenizer.json: a vocabulary of 152,000 with as many merges has 0.7
million. An empty list costs tokenizers 32 bytes and more."""

TOKENIZER_STEPS = 64
"""Of its normalizer, pre-tokenizer or decoder: 8 are the most known."""

TOKENIZER_GROWTH = 64
"""A normalizer or decoder may make a text so many times as long: those of Llama and Qwen, at most
twice."""

ADDED_TOKENS = 20_000
"""Of a tokenizer: 6,400 is the most known; tokenizers compares each with all others."""

SENTENCEPIECE_BYTES = 16 * MIB
"""Of a tokenizer.model: that of a vocabulary of 256,000 has 4 MiB."""

SAFETENSORS_HEADER_BYTES = 4 * MIB
"""Of the header of a safetensors file: 100 bytes a tensor; 1,200 tensors make 405 billion
parameters."""

LAYERS = 4096
"""Of a model: 126 is the deepest known, and twelve names are made for each before one is read."""

SIZE = 1 << 31
"""Of any number that shapes a model: larger ones are in no file, and products of them in no
register."""

# --------------------------------------------------------------------------------- chat templates

TEMPLATE_BYTES = 256 * KIB
"""Of a chat template: the longest known has 20 KiB."""

TEMPLATE_CPU_S = 1.5
"""Of one rendering: a chat of a megabyte takes a hundredth of a second."""

TEMPLATE_MEMORY_BYTES = 80 * MIB
"""Of the process that renders, above what it starts with."""

TEMPLATE_GROWTH = 4
"""A rendered chat may be so many times as long as its messages and the template together:
templates write what they are given, once."""

# --------------------------------------------------------------------------------------- GGUF files

GGUF_VALUES = 4096
"""Metadata of a GGUF file: 60 are usual."""

GGUF_ITEMS = 1_500_000
"""Of all arrays of its metadata together: tokens, merges and types of a vocabulary of 262,144 have
1.1 million; a text costs 60 bytes and more."""

GGUF_METADATA_BYTES = 32 * MIB
"""Of its metadata: a vocabulary of 262,144 has 16 MiB."""

GGUF_TENSORS = 65_536
"""Of a GGUF file, as `LAYERS` has."""

GGUF_DIMENSIONS = 4
"""Of a tensor: ggml has no more."""

GGUF_ALIGNMENT = 1 << 16
"""Of its tensors, in bytes: 32 is usual."""

# ------------------------------------------------------------------------ archives and checkpoints

ARCHIVE_MEMBERS = 10_000
"""Of a tar: two files a rank and some; tarfile reads 40,000 headers a second."""

ARCHIVE_HEADER_BYTES = MIB
"""Of one header of a tar, with its long names: tarfile reads it at once."""

ARCHIVE_HEADERS_BYTES = 32 * MIB
"""Of all headers of a tar: three blocks a member; a damaged list of holes is read for ever."""

WHOLE_FILE_BYTES = 256 * MIB
"""Of a file that is read at once; weights are read piece by piece."""

INDEX_BYTES = 2 * MIB
"""Of the index of a torch_dist checkpoint, or a 16th of its files: a byte of a pickle may become
60."""
INDEX_SHARE = 16

PIECES = 4096
"""Of one tensor: as many ranks would have written it."""

PIECE_OVERHEAD = MIB
"""What a stored piece may have beside its values: a zip archive of it has two KiB."""

PLAIN_BYTES = 32 * MIB
"""Of a checkpoint's common.pt: a configuration, and the texts of a context."""

PLAIN_OPERATIONS = 400_000
"""Of its pickle: an item of a configuration takes four; torch's reader takes 2 microseconds for
each."""

# ------------------------------------------------------------------------- stored configurations

CONFIGURATION_BYTES = MIB
"""Of a stored configuration: without the texts of a context 10 KiB."""

CONFIGURATION_ITEMS = 100_000
"""Of its values, keys and brackets: a run's configuration has 500; YAML takes 10 microseconds for
each."""

CONFIGURATION_DEPTH = 32
"""Of its levels: a run's configuration has 6; parsers are slow in thousands."""

# --------------------------------------------------------------------------------------- data files

ROW_BYTES = 4 * MIB
"""Of a row of a data file, or of a text in it: a prompt of 4 MiB has about a million tokens, more
than a model reads; parsed, it is 100 MiB of Python objects at worst."""

TABLE_COLUMNS = 10_000
"""Of a table of text: each has a name and a text in every row."""

PARQUET_BYTES = 64 * MIB
"""Of what a parquet file unpacks to, however small it is; above, `PARQUET_COMPRESSION` times its
size. Dictionaries and compression make 4 GiB of a kilobyte."""

PARQUET_COMPRESSION = 100
"""Compression makes a third of text, and a fiftieth of text that repeats itself."""

PARQUET_ROW_BYTES = 256
"""What a row counts at least in `PARQUET_BYTES`: it takes as long to read as a text of that length,
and a billion equal rows fit into a kilobyte."""

PARQUET_VALUES = 16 * MIB
"""In a column of a row group: writers put a million rows into one, and a chat has some messages."""

PARQUET_FOOTER_BYTES = 4 * MIB
"""Of the end of a parquet file, which describes its columns: 4,000 row groups of 10 columns."""

PARQUET_PAGES = 100_000
"""Of a parquet file: writers make pages of a MiB, or one a column and row group."""

# ------------------------------------------------------------------ numbers of a configuration
# beyond these a number is a slip of the pen, or is meant to break something

MOST_STEPS = 1_000_000_000
"""Of steps, questions and tokens: more than any run has, and sums of some stay below 64 bits."""
MOST_SEQUENCES = 1_000_000
"""Of a batch: the turns of an episode draw from numbers this far apart (`rollout.collect`)."""
MOST_SEED = 2**63 - 1
"""torch's generators take 64 bits, and Megatron adds the number of a rank."""
MOST_TOKENS = 10_000_000
"""Of an answer, a prompt or a context: beyond the positions of any model."""
MOST_RANKS = 100_000
"""Processes of a run: ten times the largest clusters that train one model."""
MOST_VOCABULARY = 10_000_000
"""Rows of an embedding: forty times the largest that models have."""
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.001, 100.0
"""Below, logits divided by it leave fp32's range; above, every token is as likely as any other."""
