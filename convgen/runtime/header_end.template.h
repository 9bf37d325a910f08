/* What this library is, and what a status means. */
const char *${name}_version(void);
const char *${name}_error(int status);

#ifdef __cplusplus
}
#endif

#endif
