#!/usr/bin/env bash
# Trains on Kubernetes, as a JobSet: one pod per node. When one is lost, all restart together and go on from what was saved.
#   bash launch/kubernetes/run.sh --name mov --image IMAGE --gpu 2 --claim runs:/runs \
#     moe-peft train --gin_file experiments/mov/3b/mov_10.gin --gin.MODEL_DIR=/runs/mov
# --name NAME             of the JobSet
# --image IMAGE           made from launch/kubernetes/Dockerfile
# --namespace NAMESPACE   (default: kubectl's own)
# --gpu NODES             nodes with --gpus_per_node GPUs each (default 8), one process a node
# --tpu TYPE:TOPOLOGY     a slice of GKE's: v5e:4x4, v6e:8x8, v4:2x2x4, v5p:4x4x4; --slices N of them (default 1)
# --chips_per_node N      of the TPU node pool's machines (default 4; 1x1 has 1, v5e:2x4 may have 8)
# --claim CLAIM:FOLDER    volume claim that all pods mount at FOLDER; MODEL_DIR has to be below it
# --service_account NAME  of the pods
# --node_selector K=V     label of the nodes, repeatable (default for GPUs: GKE's H100 nodes)
# --spot                  on GKE's spot nodes
# --grace SECONDS         for saving, when a pod is told to end (default 120)
# --max_restarts N        after which the JobSet fails (default 20); a mistake that a person has to fix fails at once
# --dry_run               print what would be applied, and apply nothing
# The cluster needs the JobSet controller (jobset.x-k8s.io/v1alpha2).
set -euo pipefail
script="launch/kubernetes/run.sh"
here="$(cd "$(dirname "$0")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/../common.sh"

name="" image="" namespace="" gpu="" gpus_per_node=8 tpu="" slices=1 chips_per_node="" claim="" service_account=""
selectors=() spot="" grace=120 max_restarts=20 dry_run=""
while [ $# -gt 0 ]; do
  case "$1" in
    --name | --image | --namespace | --gpu | --gpus_per_node | --tpu | --slices | --chips_per_node | --claim | --service_account | --grace | --max_restarts)
      printf -v "${1#--}" %s "${2:-}"
      shift 2 || usage ;;
    --node_selector) selectors+=("${2:-}"); shift 2 || usage ;;
    --spot) spot=1; shift ;;
    --dry_run) dry_run=1; shift ;;
    --help | -h) usage ;;
    --*) fail "unknown flag $1; --help lists them, and the command comes after all of them" ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || usage

for flag in name image claim; do
  [ -n "${!flag}" ] || fail "--$flag is missing; --help says what it is"
done
for flag in gpus_per_node slices grace max_restarts; do
  is_count "${!flag}" || fail "--$flag is '${!flag}'; expected a whole number"
done
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--name is '$name'; expected up to 40 of a-z, 0-9 and -, a letter first"
[[ "$claim" =~ ^([^:]+):(/[^:]+)$ ]] || fail "--claim is '$claim'; expected CLAIM:/FOLDER, such as runs:/runs"
claim="${BASH_REMATCH[1]}" folder="${BASH_REMATCH[2]}"
find_model_dir "$@"
[[ "$model_dir" == "$folder"/* ]] || fail "MODEL_DIR is $model_dir, which is lost with its pod; expected a folder below $folder, the --claim's"
for selector in ${selectors[@]+"${selectors[@]}"}; do
  [[ "$selector" == ?*=* ]] || fail "--node_selector is '$selector'; expected KEY=VALUE"
done

if [ -n "$gpu" ] && [ -z "$tpu" ]; then
  [[ "$gpu" =~ ^[1-9][0-9]*$ ]] || fail "--gpu is '$gpu'; expected a number of nodes"
  role=gpu pods="$gpu" resource=nvidia.com/gpu per_pod="$gpus_per_node"
  [ ${#selectors[@]} -gt 0 ] || selectors=(cloud.google.com/gke-accelerator=nvidia-h100-80gb)
elif [ -n "$tpu" ] && [ -z "$gpu" ]; then
  topology="${tpu#*:}"
  case "$tpu" in
    v4:*x*x*) accelerator="tpu-v4-podslice" ;;
    v5p:*x*x*) accelerator="tpu-v5p-slice" ;;
    v5e:*x*) accelerator="tpu-v5-lite-podslice" ;;
    v6e:*x*) accelerator="tpu-v6e-slice" ;;
    *) accelerator="" ;;
  esac
  [ -n "$accelerator" ] && [[ "$topology" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    fail "--tpu is '$tpu'; expected v5e:AxB, v6e:AxB, v4:AxBxC or v5p:AxBxC"
  chips=$((${topology//x/*}))
  per_pod="${chips_per_node:-$((chips < 4 ? chips : 4))}"
  [[ "$per_pod" =~ ^[1-9]$ ]] && [ $((chips % per_pod)) -eq 0 ] ||
    fail "--chips_per_node is '$per_pod'; expected a number that divides the $chips chips of $tpu"
  role=tpu pods=$((chips / per_pod)) resource=google.com/tpu
  selectors+=("cloud.google.com/gke-tpu-accelerator=$accelerator" "cloud.google.com/gke-tpu-topology=$topology")
else
  fail "expected one of --gpu NODES and --tpu TYPE:TOPOLOGY"
fi
[ -z "$spot" ] || selectors+=(cloud.google.com/gke-spot=true)
# Nodes may be made first, one after another.
if [ "${2:-}" = train ] && [[ "$*" != *--distributed_timeout* ]]; then set -- "$@" --distributed_timeout 1800; fi

# A YAML string; JSON's escapes are YAML's.
text() {
  local escaped="${1//\\/\\\\}"
  escaped="${escaped//\"/\\\"}"
  printf '"%s"' "${escaped//$'\n'/\\n}"
}

manifest() {
  local word key
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
END
  [ -z "$namespace" ] || printf '  namespace: %s\n' "$(text "$namespace")"
  if [ "$role" = tpu ] && [ "$slices" -gt 1 ]; then
    cat <<END
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool # A slice, a node pool.
END
  fi
  cat <<END
spec:
  network:
    enableDNSHostnames: true
    subdomain: $name
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
      - name: mistake # Restarting does not fix it.
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: $role
      replicas: $([ "$role" = tpu ] && echo "$slices" || echo 1)
      template:
        spec:
          completionMode: Indexed
          completions: $pods
          parallelism: $pods
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: { containerName: train, operator: In, values: [2] }
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $grace
END
  [ -z "$service_account" ] || printf '              serviceAccountName: %s\n' "$(text "$service_account")"
  echo "              nodeSelector:"
  for word in "${selectors[@]}"; do
    printf '                %s: %s\n' "${word%%=*}" "$(text "${word#*=}")"
  done
  cat <<END
              tolerations:
                - { key: $resource, operator: Exists, effect: NoSchedule }
              containers:
                - name: train
                  image: $(text "$image")
                  command:
END
  for word in "$@"; do
    printf '                    - %s\n' "$(text "$word")"
  done
  echo "                  env:"
  echo '                    - { name: PYTHONUNBUFFERED, value: "1" }'
  if [ "$role" = gpu ] && [ "$pods" -gt 1 ]; then
    # The pod's index comes from Kubernetes, as JOB_COMPLETION_INDEX. GKE itself tells the pods of a TPU slice.
    for key in "COORDINATOR $name-$role-0-0.$name:8476" "NUM_PROCESSES $pods"; do
      printf '                    - { name: MOE_PEFT_%s, value: "%s" }\n' "${key% *}" "${key#* }"
    done
  fi
  cat <<END
                  resources:
                    limits: { $resource: $per_pod }
                  volumeMounts:
                    - { name: runs, mountPath: $(text "$folder") }
                    - { name: shm, mountPath: /dev/shm }
              volumes:
                - { name: runs, persistentVolumeClaim: { claimName: $(text "$claim") } }
                - { name: shm, emptyDir: { medium: Memory } }
END
}

apply=(kubectl apply --filename=-)
if [ -n "$dry_run" ]; then
  echo "# $(quoted "${apply[@]}") <<END"
  manifest "$@"
  exit
fi
command -v kubectl >/dev/null || fail "kubectl was not found; install it, or look with --dry_run"
manifest "$@" | "${apply[@]}"
in=(${namespace:+"--namespace=$namespace"})
echo "to follow it: $(quoted kubectl logs ${in[@]+"${in[@]}"} --follow --prefix "--selector=jobset.sigs.k8s.io/jobset-name=$name")" >&2
echo "to end it: $(quoted kubectl delete jobset ${in[@]+"${in[@]}"} "$name")" >&2
