#!/usr/bin/env bash
# One GPU, two with DDP, two with sharded weights; a rank that is lost; 7 billion parameters.
# On two H200s the rows that were measured took 235 seconds. Every row has its own folder in OUT.
# usage: runs/two_gpus.sh [OUT]
set -euo pipefail
OUT="${1:-out/two_gpus}"
SMOL="--n_layer=30 --n_embd=576 --n_head=9 --n_kv_head=3 --head_dim=64 --n_inner=1536
  --block_size=1024 --vocab_size=49152"
SEVEN="--n_layer=32 --n_embd=4096 --n_head=32 --n_kv_head=32 --head_dim=128 --n_inner=11008
  --block_size=1024 --vocab_size=32000 --tie_embeddings=false"

# tokens per second of SmolLM2's shape: one GPU, kernel by kernel as several do, and as one graph;
# half its batch, DDP kernel by kernel and as a graph on each, FSDP2
python -m benchmarks.ranks $SMOL --results="$OUT" --name=one
python -m benchmarks.ranks $SMOL --results="$OUT" --name=graph --capture --same_as=one
python -m benchmarks.ranks $SMOL --results="$OUT" --name=half --batch_size=16
python -m benchmarks.ranks $SMOL --results="$OUT" --name=ddp --ranks=2 --same_as=one
python -m benchmarks.ranks $SMOL --results="$OUT" --name=ddp_graph --ranks=2 --capture \
  --same_as=one
python -m benchmarks.ranks $SMOL --results="$OUT" --name=fsdp --ranks=2 --shard --same_as=one

# the same losses in float32, 40 steps
F32="--dtype=float32 --batch_size=4"
python -m benchmarks.ranks $SMOL $F32 --results="$OUT" --name=one32
python -m benchmarks.ranks $SMOL $F32 --results="$OUT" --name=ddp32 --ranks=2 --same_as=one32
python -m benchmarks.ranks $SMOL $F32 --results="$OUT" --name=ddp_graph32 --ranks=2 --capture \
  --same_as=one32
python -m benchmarks.ranks $SMOL $F32 --results="$OUT" --name=fsdp32 --ranks=2 --shard \
  --same_as=one32

# a rank is killed: of sharded weights, and of graphs that are replayed
python -m benchmarks.ranks $SMOL --results="$OUT" --what=lost --name=lost --ranks=2 --shard
python -m benchmarks.ranks $SMOL --results="$OUT" --what=lost --name=lost_graph --ranks=2 --capture

# 7 billion parameters: adapters on one GPU, all weights on two; generation whole, with the steps of
# a split model on one GPU, and split over two, whose tokens are those of the row before
python -m benchmarks.ranks $SEVEN --results="$OUT" --name=lora7b --adapter=lora \
  --weights=bfloat16 --batch_size=4 --steps=10
python -m benchmarks.ranks $SEVEN --results="$OUT" --name=all7b --ranks=2 --shard \
  --batch_size=2 --steps=10
GENERATE="--what=generate --weights=bfloat16 --batch_size=4"
python -m benchmarks.ranks $SEVEN --results="$OUT" $GENERATE --name=whole7b
python -m benchmarks.ranks $SEVEN --results="$OUT" $GENERATE --name=plain7b \
  --devices=cuda:0,cuda:0 --same_as=whole7b
python -m benchmarks.ranks $SEVEN --results="$OUT" $GENERATE --name=split7b \
  --devices=cuda:0,cuda:1 --same_as=plain7b
