# shellcheck shell=bash
# Shared by the launchers that hand a command to other machines. Each sets `script`, its own path in the checkout.

# Ends with one line about a mistake that a person can fix.
fail() {
  echo "${script:?}: $*" >&2
  exit 2
}

# Prints the comment at the top of the script.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# Prints words so that a shell reads them back as they are.
quoted() {
  local text
  printf -v text '%q ' "$@"
  echo "${text% }"
}

is_count() {
  [[ "$1" =~ ^[0-9]+$ ]]
}

# Sets `model_dir` to the folder that the command names as MODEL_DIR. Refuses one that is not in a file system.
find_model_dir() {
  local word
  model_dir=""
  [ "${1##*/}" = moe-peft ] || fail "the command begins with '$1'; expected moe-peft, as in: moe-peft train --gin_file ..."
  for word in "$@"; do
    case "$word" in --gin.MODEL_DIR=*) model_dir="${word#*=}" ;; esac
  done
  model_dir="${model_dir//[\'\"]/}"
  [ -n "$model_dir" ] || fail "the command names no MODEL_DIR; add --gin.MODEL_DIR=FOLDER, one that all processes see"
  [[ "$model_dir" != *://* ]] ||
    fail "MODEL_DIR is $model_dir, but runs are written as plain files; mount the bucket and name the folder where it is mounted"
}
