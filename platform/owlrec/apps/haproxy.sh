#!/bin/sh
# HAProxy with changes to the configuration that Ray Serve 2.60 writes; RAY_SERVE_HAPROXY_BINARY_PATH names this file.
#
# - Metrics and statistics listen on loopback. Ray binds both on all interfaces (serve/_private/haproxy_templates.py),
#   whatever host is served.
# - Beyond OWLREC_MAXCONN requests at a replica of the lookup, requests wait here for at most 50 ms and then get a 503
#   that costs the replica nothing. Ray's template has no limit per server, and answers 503 as 500.
#
# If a line to change is missing, Ray has changed its template, and this ends instead of starting HAProxy.
set -eu
config=
previous=
for word in "$@"; do
    [ "$previous" = -f ] && config=$word
    previous=$word
done
if [ -n "$config" ]; then
    sed -E \
        -e 's/^( *bind )\*?:([0-9]+) *$/\1127.0.0.1:\2/' \
        -e "/^backend .*knowledge/,/^backend /s/^( *default-server .*[^0-9])$/\\1 maxconn ${OWLREC_MAXCONN:-16} maxqueue 2048/" \
        -e "s|^( *errorfile 503 ).*$|\\1$(dirname "$0")/haproxy-503.http|" \
        -e '/^ *timeout queue /d' \
        -e 's/^( *)(balance .*)$/\1timeout queue 50ms\n\1option dontlog-normal\n\1\2/' \
        "$config" >"$config.owlrec"
    pages=$(sed -nE '/^(frontend prometheus|listen stats)/,/^ *bind /p' "$config.owlrec")
    if [ "$(echo "$pages" | grep -cE '^ *bind 127\.0\.0\.1:[0-9]+$')" != 2 ] || ! grep -q 'timeout queue' "$config.owlrec" || ! grep -q 'haproxy-503' "$config.owlrec"; then
        echo "owlrec: Ray's HAProxy template is not the one of 2.60: see haproxy.sh" >&2
        exit 1
    fi
    mv "$config.owlrec" "$config"
fi
exec "$OWLREC_HAPROXY" "$@"
