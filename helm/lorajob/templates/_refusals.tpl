{{/* What no schema can say: values that do not go together, and secrets among them. */}}

{{- define "lorajob.refuse" -}}
{{- include "lorajob.refuseSecrets" (dict "at" "" "value" (omit .Values "global")) -}}
{{- include "lorajob.refuseEnv" . -}}
{{- include "lorajob.refuseVolumes" . -}}
{{- if and (ne .Values.work.kind "claim") (not .Values.spec.publish) -}}
{{- fail (printf "work.kind: with %s nothing would be left of the run, for spec.publish names no place\n  -> name one in spec.publish, or set work.kind to claim" .Values.work.kind) -}}
{{- end -}}
{{- if and .Values.gpu.claims (gt (int .Values.gpu.count) 0) -}}
{{- fail "gpu.claims: GPUs are asked for twice, by claims and by gpu.count\n  -> set gpu.count to 0" -}}
{{- end -}}
{{- end }}

{{/* Goes through all values. The message names the place and never the value. */}}
{{- define "lorajob.refuseSecrets" -}}
{{- $at := .at -}}
{{- if kindIs "map" .value -}}
{{- range $key, $value := .value -}}
{{- include "lorajob.refuseSecrets" (dict "at" (printf "%s.%s" $at $key | trimPrefix ".") "value" $value) -}}
{{- end -}}
{{- else if kindIs "slice" .value -}}
{{- range $index, $value := .value -}}
{{- include "lorajob.refuseSecrets" (dict "at" (printf "%s[%d]" $at $index) "value" $value) -}}
{{- end -}}
{{- else if kindIs "string" .value -}}
{{- if regexMatch (include "lorajob.secretForms" .) .value -}}
{{- fail (printf "%s: holds a secret, which would be read by everyone who may read the release\n  -> put it into a Secret, and name that in credentials" $at) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Forms that only secrets have; what a run itself refuses in a spec is more (jobs/secrets.py). */}}
{{- define "lorajob.secretForms" -}}
-----BEGIN[A-Z0-9 ]* PRIVATE KEY|\bhf_[A-Za-z0-9]{30,}|\bA(KIA|SIA)[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{35}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}|\bglpat-[A-Za-z0-9_-]{20,}|\bxox[abeoprs]-[A-Za-z0-9-]{16,}|\bsk-[A-Za-z0-9_-]*[0-9][A-Za-z0-9_-]{16,}|\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.|://[^\s/@:]*:[^\s/@]+@|(?i:[?&](X-Amz-Signature|X-Amz-Credential|Signature|sig|token)=)
{{- end }}

{{- define "lorajob.refuseEnv" -}}
{{- $seen := dict -}}
{{- range list "LORAJOB_SPEC" "LORAJOB_WORK" "LORAJOB_CACHE" -}}
{{- $_ := set $seen . "the chart" -}}
{{- end -}}
{{- range $index, $key := .Values.credentials.keys -}}
{{- include "lorajob.refuseTwice" (dict "seen" $seen "name" $key.env "at" (printf "credentials.keys[%d].env" $index)) -}}
{{- end -}}
{{- range $index, $env := .Values.extra.env -}}
{{- $at := printf "extra.env[%d]" $index -}}
{{- include "lorajob.refuseTwice" (dict "seen" $seen "name" $env.name "at" (printf "%s.name" $at)) -}}
{{- if hasPrefix "LORAJOB__" $env.name -}}
{{- fail (printf "%s: %s would change the spec behind the chart's back\n  -> set the field in spec" $at $env.name) -}}
{{- end -}}
{{- if and (hasKey $env "value") (regexMatch "(?i)(^|_)(SECRET|PASSWORD|PASSWD|PASSPHRASE|PAT|API_?KEY|SECRET_KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS?|TOKEN)$" $env.name) -}}
{{- fail (printf "%s: %s is a secret, and would be read by everyone who may read the release\n  -> put it into a Secret, and name that in credentials.keys" $at $env.name) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "lorajob.refuseVolumes" -}}
{{- $names := dict -}}
{{- range list "spec" "work" "cache" "tmp" "shm" -}}
{{- $_ := set $names . "the chart" -}}
{{- end -}}
{{- range $index, $volume := .Values.extra.volumes -}}
{{- include "lorajob.refuseTwice" (dict "seen" $names "name" $volume.name "at" (printf "extra.volumes[%d].name" $index)) -}}
{{- end -}}
{{- $paths := dict -}}
{{- range list "/etc/lorajob" "/work" "/cache" "/tmp" "/dev/shm" -}}
{{- $_ := set $paths . "the chart" -}}
{{- end -}}
{{- range $index, $mount := .Values.extra.mounts -}}
{{- include "lorajob.refuseTwice" (dict "seen" $paths "name" (clean $mount.mountPath) "at" (printf "extra.mounts[%d].mountPath" $index)) -}}
{{- if or (not (hasKey $names $mount.name)) (eq (get $names $mount.name) "the chart") -}}
{{- fail (printf "extra.mounts[%d].name: %s is not among extra.volumes\n  -> add it there" $index $mount.name) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "lorajob.refuseTwice" -}}
{{- if hasKey .seen .name -}}
{{- fail (printf "%s: %s is already set by %s\n  -> take another, or leave it out" .at .name (get .seen .name)) -}}
{{- end -}}
{{- $_ := set .seen .name .at -}}
{{- end }}
