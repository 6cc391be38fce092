#!/bin/sh
# Make the build host's key and the workers' key, once, and tell each side about the other.
# Removing a private key and running this again replaces it.
set -eu
umask 077

make_key() {  # path comment
    [ -s "$1" ] && return
    rm -f "$1.new" "$1.new.pub"
    ssh-keygen -q -t ed25519 -N '' -C "$2" -f "$1.new"
    rm "$1.new.pub"
    mv "$1.new" "$1"  # in one step: a key is there or not
}

publish() {  # path, text on stdin
    cat > "$1.new"
    mv "$1.new" "$1"
}

make_key /keys/host/ssh_host_ed25519_key build-host
make_key /keys/client/id_ed25519 pool-worker
host=$(ssh-keygen -y -f /keys/host/ssh_host_ed25519_key)
worker=$(ssh-keygen -y -f /keys/client/id_ed25519)
echo "$worker" | publish /keys/host/authorized_keys
echo "[build-host]:2222 $host" | publish /keys/client/known_hosts
