#!/usr/bin/env bash
# The first fifty minutes on a GPU: five stages of under ten minutes each, on an H100 with 80 GB or an H200, without a network.
#   OUT=results bash benchmarks/first_gpu.sh A      # then B to E, in the root of a checkout
#   A  what the device reaches; the four goals: 8B LoRA in bf16 and on an fp8 base, 3B in full, 70B LoRA on nf4
#   B  the GPU tests, products one by one, profiles of 8B in bf16 and fp8, the first step cold and warm
#   C  what is to be decided: bases in fp8 and nf4 beside bf16, attention and experts by torch's kernels, batches of the
#      recipe's own size, least memory, a kill and the start after it
#   D  mixtures of experts: the products of a GPU beside those of a CPU; Qwen3-30B-A3B in bf16, and its kernels; gpt-oss-120b in
#      MXFP4 with an adapter on attention, as 80 GB hold no more
#   E  layers that stream from the host, which needs 90 GB: 8B beside itself without, also with memory that is not page-locked,
#      48 layers of the 70B, Qwen3-30B-A3B
# FOLDER (default .gpu) is made by first_gpu_prep.sh. $OUT gets three files:
#   results-STAGE.json      every figure; rewritten after each step, so that a stage that is killed keeps what ran before
#   stage-STAGE.log         what the steps printed
#   caches-STAGE.tar.gz     compiled code and tokens; copied into FOLDER, it spares the next stage the time
# LIMIT bounds the stage, and LIMIT_<STEP> one step (LIMIT_8B_BF16=200), in seconds. A step that fails ends nothing.
# RECIPE=FILE measures that recipe in place of the true shapes, two steps each: whether every stage runs, on any machine.
set -u

stage=${1:?stage: A, B, C, D or E}
case $stage in A | B | C | D | E) ;; *) echo "there is no stage $stage: A, B, C, D or E" >&2; exit 2 ;; esac
mkdir -p "${OUT:?OUT: the folder for the results}"
out=$(cd "$OUT" && pwd)
folder=${FOLDER:-.gpu}
python=${PYTHON:-python3}
limit=${LIMIT:-580}
reserve=${RESERVE:-25}        # seconds at the end of a stage, to pack the caches
shortest=${SHORTEST:-15}      # a step with fewer seconds left is not started
cache_mib=${CACHE_MIB:-15}    # the largest archive that a machine sends back
began=$SECONDS

cache=${TMPDIR:-/tmp}/tunesmith-first-gpu
work=$cache/stage-$stage
log=$out/stage-$stage.log
rm -rf "$work"
mkdir -p "$work" "$cache/tunesmith"
: >"$work/steps.tsv"
: >"$log"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
export PYTHONPATH=$folder/site-$version:$PWD/src${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 XDG_CACHE_HOME=$cache

# Some virtual machines get memory as they use it: what a run took is read beside these figures.
for command in date nvidia-smi 'free -m' 'df -h'; do $command; done >>"$log" 2>&1
echo "Python $version; packages for it in $folder: $(ls -d "$folder"/site-* 2>/dev/null || echo none)" >>"$log"
for archive in "$folder"/caches-*.tar.gz; do
  [ -f "$archive" ] && tar -xzf "$archive" -C "$cache" 2>>"$log"
done

collect_results() {
  local commit=
  [ -f "$folder/commit" ] && commit=$(cat "$folder/commit")
  "$python" benchmarks/speed/first_gpu_results.py --stage "$stage" --work "$work" --output "$out/results-$stage.json" \
    --commit "$commit" >>"$log" 2>&1
}

# Compiled code and the tokens of the rows; not the models that a .gguf was converted to.
pack_caches() {
  local archive=$out/caches-$stage.tar.gz
  (cd "$cache" && timeout "$reserve" tar -czf "$archive" --exclude='tunesmith/models' tunesmith) 2>>"$log"
  if [ "$(size_of "$archive")" -gt $((cache_mib << 20)) ]; then
    # The cache of graphs holds the kernels of each graph too: it fills Triton's own folder again.
    (cd "$cache" && timeout "$reserve" tar -czf "$archive" --exclude='tunesmith/models' --exclude='triton' tunesmith) 2>>"$log"
  fi
  if [ "$(size_of "$archive")" -gt $((cache_mib << 20)) ]; then
    rm "$archive"
    echo "the caches are larger than $cache_mib MiB and stay here" | tee -a "$log"
  fi
}

size_of() { # bytes of a file, 0 where there is none
  stat -c %s "$1" 2>/dev/null || echo 0
}

# Run a command under a limit of its own; what is left of the stage bounds it too.
#   step NAME SECONDS COMMAND...
step() {
  local name=$1 seconds=$2
  shift 2
  local variable=LIMIT_${name^^}
  variable=${variable//-/_}
  seconds=${!variable:-$seconds}
  local left=$((limit - reserve - (SECONDS - began)))
  [ "$seconds" -gt "$left" ] && seconds=$left
  if [ "$seconds" -lt "$shortest" ]; then
    echo "skipped $name: no time is left in this stage" | tee -a "$log"
    printf '%s\tskipped\t0\t0\n' "$name" >>"$work/steps.tsv"
    collect_results
    return 9
  fi
  echo "== $name: $*" >>"$log"
  local start=$SECONDS
  timeout -k 5 "$seconds" "$@" >>"$log" 2>&1
  local status=$?
  printf '%s\t%s\t%s\t%s\n' "$name" "$status" $((SECONDS - start)) "$seconds" >>"$work/steps.tsv"
  echo "$name ended with $status after $((SECONDS - start)) s, $((SECONDS - began)) s into the stage" | tee -a "$log"
  collect_results
  return $status
}

# Sets `bench_words`: what `tunesmith bench` takes for a shape and further words, or for RECIPE.
set_bench_words() {
  local shape=$1
  shift
  if [ -n "${RECIPE:-}" ]; then
    bench_words=("$RECIPE" "$@" --steps 2 --warmup 0)
  else
    bench_words=(--shape "$shape" --tokenizer "$folder/tokenizer" --data "$folder/rows.json" "$@")
  fi
}

#   bench NAME SECONDS SHAPE [words of tunesmith bench]
bench() {
  local name=$1 seconds=$2
  shift 2
  set_bench_words "$@"
  step "$name" "$seconds" "$python" -m tunesmith bench --json "$work/$name.json" "${bench_words[@]}"
}

#   ablation NAME SECONDS ONLY...; after set_bench_words
ablation() {
  local name=$1 seconds=$2
  shift 2
  step "$name" "$seconds" "$python" benchmarks/speed/ablation.py --only "$@" --rounds 1 --json "$work/$name.json" "${bench_words[@]}"
}

full=(adapter.kind=none train.global_batch='65536 tokens')
least_memory=(train.recompute=full train.micro_batch='2048 tokens')
own_batch=(train.global_batch='64 examples')
profile=(--steps 3 --warmup 3 --profile "$work/traces" profile.wait=0 profile.warmup=1 profile.active=2)
micro=(--repeat 20)
# Each pass reads all experts: more tokens share that.
experts=(train.global_batch='32768 tokens')
attention_alone=('adapter.target=[q_proj,k_proj,v_proj,o_proj]')
small=()
resume=(--shape llama3-3b --layers 4 --tokenizer "$folder/tokenizer" --data "$folder/rows.json")
if [ -n "${RECIPE:-}" ]; then
  full=(adapter.kind=none)
  least_memory=(train.recompute=full)
  own_batch=()
  experts=()
  attention_alone=()
  micro=(--repeat 1 --tokens 512 --divide 16)
  small=(--small)
  resume=("$RECIPE")
fi

step device 25 "$python" benchmarks/speed/device_facts.py --output "$work/device.json"
# Each step would end so by itself, after the seconds that loading takes.
[ $? -eq 3 ] && { tail -n 1 "$log"; exit 2; }
case $stage in
A)
  bench 8b-bf16 120 llama3-8b
  compiled=$?
  bench 8b-fp8 115 llama3-8b model.quantize=fp8
  bench 3b-full 115 llama3-3b "${full[@]}" --steps 10 --warmup 3
  bench 70b-nf4 170 llama3-70b model.quantize=nf4 --steps 4 --warmup 2
  [ "$compiled" -eq 0 ] || bench 8b-bf16-eager 100 llama3-8b train.compile=off
  ;;
B)
  # Most of the tests' time is compiling, on the host; each worker has two processes for that, not one for each core.
  TORCHINDUCTOR_COMPILE_THREADS=2 step tests 140 "$python" -m pytest -m gpu -n 6 -vv -rs -p no:cacheprovider \
    --junitxml "$work/tests.xml"
  step micro 75 "$python" benchmarks/speed/micro.py "$work/micro.json" "${micro[@]}"
  bench 8b-bf16-profile 90 llama3-8b "${profile[@]}"
  bench 8b-fp8-profile 95 llama3-8b model.quantize=fp8 "${profile[@]}"
  # The second of them finds what the first has compiled.
  export TORCHINDUCTOR_CACHE_DIR=$work/cold TRITON_CACHE_DIR=$work/cold/triton
  bench 8b-cold 90 llama3-8b --steps 5
  bench 8b-warm 40 llama3-8b --steps 1 --warmup 0
  rm -rf "$work/cold"
  ;;
C)
  set_bench_words llama3-8b --steps 6 --warmup 3
  ablation bases 150 model.quantize=fp8 model.quantize=nf4
  bench own-batch 55 llama3-8b "${own_batch[@]}"
  bench least-memory 50 llama3-8b "${least_memory[@]}" --steps 6 --warmup 3
  step kill-and-resume 65 "$python" benchmarks/faults/kill_and_resume.py "${resume[@]}" --json "$work/kill-and-resume.json"
  # FlashAttention 3 and 4 run where first_gpu_prep.sh was given their wheels; else they are left out, and it says so.
  set_bench_words llama3-8b --steps 6 --warmup 3
  ablation attention 100 'attention kernels' 'FlashAttention 3' 'FlashAttention 4'
  set_bench_words qwen3-30b-a3b "${experts[@]}" --steps 4 --warmup 2
  ablation experts 130 'experts by token'
  ;;
D)
  step experts-agree 40 "$python" benchmarks/parity/grouped_products.py --output "$work/experts-agree.json"
  bench 30b-experts 165 qwen3-30b-a3b "${experts[@]}" --steps 6 --warmup 2
  bench 30b-experts-profile 135 qwen3-30b-a3b "${experts[@]}" "${profile[@]}"
  bench 120b-attention 185 gpt-oss-120b "${experts[@]}" "${attention_alone[@]}" --steps 3 --warmup 1
  ;;
E)
  streamed=("$python" benchmarks/speed/streamed.py "${small[@]}")
  step streamed-8b 150 "${streamed[@]}" --only link,8b --steps 4 --output "$work/streamed-8b.json"
  step streamed-70b 170 "${streamed[@]}" --only 70b,planned --steps 3 --output "$work/streamed-70b.json"
  step streamed-experts 150 "${streamed[@]}" --only experts --steps 3 --output "$work/streamed-experts.json"
  ;;
esac
pack_caches
echo "stage $stage took $((SECONDS - began)) s"
