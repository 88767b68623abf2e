{{/* The names and labels of everything. */}}

{{/*
The run's own name: the release's, and a hash of all that a Job cannot change once it is there. An
upgrade that changes any of it makes a new Job, and removes the old one; any other leaves the run be.
*/}}
{{- define "lorajob.name" -}}
{{ .Release.Name }}-{{ include "lorajob.hash" . }}
{{- end }}

{{- define "lorajob.hash" -}}
{{- $pod := include "lorajob.pod" (dict "root" . "config" "") -}}
{{- print $pod (include "lorajob.failurePolicy" .) (toJson .Values.spec) | sha256sum | trunc 8 }}
{{- end }}

{{- define "lorajob.serviceAccount" -}}
{{ .Values.serviceAccount.name | default .Release.Name }}
{{- end }}

{{- define "lorajob.workClaim" -}}
{{ .Values.work.existingClaim | default (printf "%s-work" .Release.Name) }}
{{- end }}

{{- define "lorajob.cacheClaim" -}}
{{- if .Values.cache.existingClaim -}}
{{ .Values.cache.existingClaim }}
{{- else if .Values.cache.create -}}
{{ .Release.Name }}-cache
{{- end }}
{{- end }}

{{- define "lorajob.image" -}}
{{- $image := .Values.image -}}
{{- $tag := $image.tag | default .Chart.AppVersion -}}
{{ $image.repository }}:{{ $tag }}{{ with $image.variant }}-{{ . }}{{ end }}{{ with $image.digest }}@{{ . }}{{ end }}
{{- end }}

{{- define "lorajob.selector" -}}
app.kubernetes.io/name: lorajob
app.kubernetes.io/instance: {{ .Release.Name | trunc 63 | quote }}
{{- end }}

{{- define "lorajob.labels" -}}
{{ include "lorajob.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- range $key, $value := .Values.extra.labels }}
{{ $key | quote }}: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* `metadata` of an object: a dict of root, name, and further labels and annotations. */}}
{{- define "lorajob.metadata" -}}
{{- $annotations := merge (dict) (.annotations | default dict) .root.Values.extra.annotations -}}
name: {{ .name | quote }}
labels:
  {{- include "lorajob.labels" .root | nindent 2 }}
  {{- range $key, $value := .labels }}
  {{ $key | quote }}: {{ $value | quote }}
  {{- end }}
{{- with $annotations }}
annotations:
  {{- range $key, $value := . }}
  {{ $key | quote }}: {{ $value | quote }}
  {{- end }}
{{- end }}
{{- end }}
