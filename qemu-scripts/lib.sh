# shellcheck shell=bash
# What the scripts of this folder share: where things are, how they speak, how they wait.
# Sourced, never run.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Everything that is fetched or built for guests; git ignores target/. The readers are the scripts that source this.
# shellcheck disable=SC2034
guest_dir=$repository/target/guest
# shellcheck disable=SC2034
kernel_dir=$guest_dir/kernel

# say WORDS...: one line for a person. stdout is kept for what a caller may want to read.
say() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
}

# die WORDS...: one clear line, then exit 1 (or $exit_code, where a command promises another one).
die() {
    say "$*"
    exit "${exit_code:-1}"
}

# usage_of FILE: the comment at the head of FILE is its manual.
usage_of() {
    sed -n '2,/^$/ s/^# \{0,1\}//p' "$1"
}

need_root() {
    [[ $EUID -eq 0 ]] || die "must run as root"
}

# need_value OPTION REST...: an option that takes a value was given one.
need_value() {
    [[ $# -ge 2 ]] || die "$1 needs a value"
}

# centiseconds: time since boot, in 1/100 s. It never jumps, as the wall clock may.
centiseconds() {
    local seconds_since_boot
    read -r seconds_since_boot _ </proc/uptime
    echo "$((10#${seconds_since_boot/./}))"
}

# in_seconds CENTISECONDS: 347 -> 3.47
in_seconds() {
    printf '%d.%02d' $(($1 / 100)) $(($1 % 100))
}

# How often a state that announces itself in no other way is looked at.
poll_interval=0.05

# wait_until SECONDS COMMAND...: runs COMMAND until it succeeds; fails when SECONDS are over first.
wait_until() {
    local end=$(($(centiseconds) + $1 * 100))
    shift
    until "$@"; do
        (($(centiseconds) < end)) || return 1
        sleep "$poll_interval"
    done
}
