#!/usr/bin/env bash
# What the container of a Luthier job runs: train, merge the adapter into its base, push. The job starts it again
# after a failure, and it goes on from the last checkpoint. Arguments are overrides for the config.
#
#   CONFIG         name of the YAML in /config
#   RUN            name of the run: its folder is /luthier/runs/RUN
#   NUM_PROCESSES  processes in this pod, one for each GPU
#   BASE_MODEL     in place of the YAML's base_model; empty: the YAML's
#   MERGE          true: merge the adapter into its base afterwards
#   PUSH           owner/name on the hub to push to; empty: nowhere
#   NODES          pods of the job; with several of them
#   RDZV_ENDPOINT  host and port at which they meet, and JOB_COMPLETION_INDEX, which Kubernetes sets
#   JOB_UID        which job this is, so that a pod that comes back after the training does not train again
#
# Exit status 75: the run was stopped and saved because another pod had to go; the job starts this one again too.
set -euo pipefail

folder=/luthier/runs/${RUN:?is the name of the run}
trained=/luthier/runs/.${RUN}.trained
node=${JOB_COMPLETION_INDEX:-0}

# Kubernetes tells this shell alone that the pod has to go. It passes that on, and the step in hand is finished and
# saved.
stopped=
child=
stop() {
    stopped=yes
    if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap stop TERM INT

stage() {
    echo "+ $*" >&2
    local status=0
    "$@" &
    child=$!
    if [[ -n $stopped ]]; then stop; fi # it came before there was a child to tell
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends the wait and not the child
        status=0
        wait "$child" || status=$?
    done
    child=
    if [[ -n $stopped ]]; then
        echo "stopped by Kubernetes; a new pod of this job goes on from here" >&2
        exit 143
    fi
    return "$status"
}

train() {
    local arguments=("/config/${CONFIG:?names the YAML in /config}" --num-processes "${NUM_PROCESSES:-1}")
    if ((${NODES:-1} > 1)); then
        # A name that was not found is remembered as such for a while: it is asked for seldom.
        until getent hosts "${RDZV_ENDPOINT%:*}" >/dev/null; do
            if [[ -n $stopped ]]; then exit 143; fi
            echo "node $node waits for ${RDZV_ENDPOINT%:*}" >&2
            sleep 5
        done
        arguments+=(--nnodes "$NODES" --node-rank "$node" --rdzv-endpoint "$RDZV_ENDPOINT")
    fi
    # What the job decides comes last, where it holds against any other value.
    arguments+=("$@" --output_dir "$folder" --resume_from_checkpoint auto)
    if [[ -n ${BASE_MODEL:-} ]]; then arguments+=(--base_model "$BASE_MODEL"); fi
    stage luthier train "${arguments[@]}"
}

is_trained() {
    [[ -e $trained && $(cat "$trained") == "${JOB_UID:-none}" ]]
}

mkdir -p "${folder%/*}"
if is_trained; then
    echo "this job has trained already: $folder" >&2
else
    train "$@"
    if ((node == 0)); then echo "${JOB_UID:-}" >"$trained"; fi
fi
if ((node > 0)); then
    # If node 0 has to go while it writes the result, the new one needs this node to finish the run.
    for ((waits = 0; waits < 120; waits++)); do
        if is_trained; then break; fi
        if [[ -n $stopped ]]; then exit 143; fi
        sleep 5
    done
    if ! is_trained; then
        echo "node 0 has not come to the end of the run; node $node joins it again" >&2
        exit 75
    fi
    echo "node $node is done; node 0 does the rest" >&2
    exit 0
fi

merged=()
if [[ ${MERGE:-false} == true ]]; then
    stage luthier merge-lora "$folder" --overwrite
    merged=(--merged)
fi
if [[ -n ${PUSH:-} ]]; then
    stage luthier push "$folder" "$PUSH" "${merged[@]}"
fi
